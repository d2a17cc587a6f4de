"""Fashion-MNIST: 60,000 + 10,000 pieces of clothing, 28x28 (Xiao, Rasul, Vollgraf, arXiv 1708.07747), as IDX files."""

from datasets import mnist

EPOCHS, FLIPPED, FETCHED_ON_FIRST_USE = 10, True, True
FILES = {
    "train-images-idx3-ubyte.gz": (26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
    "train-labels-idx1-ubyte.gz": (29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
    "t10k-images-idx3-ubyte.gz": (4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
    "t10k-labels-idx1-ubyte.gz": (5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
}
MIRRORS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
)
CLASS_NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def read(archive_dir):
    """Return the Source of the four IDX files in archive_dir: images uint8 [N, 28, 28, 1]."""
    return mnist.read(archive_dir, CLASS_NAMES)
