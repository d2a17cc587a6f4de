# make demo: the main job on bundled data in a few minutes.  make test: the tests.  Both set up .venv first.

PYTHON ?= python3
VENV = .venv/bin

demo: .venv/ready
	$(VENV)/python figure/compare.py --dataset Digits --model resnet8 --norm_type batch group --batch_size 1 16 \
		--seeds 1 --epochs 5 --log_step 10 --write_summary_step 10 --train_dir demo
	@echo "published, with more seeds and batch sizes (figure/studies/digits):"
	@grep -E "^\| (norm|---|batch|group) \|" figure/studies/digits/table.md
	@echo "pictures: demo/batch_size.png, demo/curves.png; all of it in TensorBoard: $(VENV)/tensorboard --logdir demo"

test: .venv/ready
	$(VENV)/ruff check .
	$(VENV)/ruff format --check --quiet .
	folder=$$(mktemp -d) && trap 'rm -rf $$folder' EXIT && TMPDIR=$$folder $(VENV)/python -m pytest  # leaves nothing behind

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet -r requirements.txt
	touch $@

.PHONY: demo test
