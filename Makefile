# make demo: the main job on bundled data in a few minutes.  make test: the tests.  Both set up .venv first.

PYTHON ?= python3
VENV = .venv/bin
DEMO = --dataset Digits --batch_size 2 --learning_rate 0.02 --max_training_step 230 --train_dir demo

demo: .venv/ready
	$(VENV)/python download.py --dataset Digits
	rm -rf demo
	$(VENV)/python trainer.py $(DEMO) --norm_type group --prefix group
	$(VENV)/python evaler.py --dataset Digits --train_dir demo
	$(VENV)/python trainer.py $(DEMO) --norm_type batch --prefix batch
	$(VENV)/python evaler.py --dataset Digits --train_dir demo
	$(VENV)/python figure/curves.py --train_dir demo --output demo/curves.png
	@echo "curves: demo/curves.png; all of it in TensorBoard: $(VENV)/tensorboard --logdir demo"

test: .venv/ready
	$(VENV)/ruff check .
	$(VENV)/python -m pytest

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet -r requirements.txt
	touch $@

.PHONY: demo test
