# For those who have make; it only calls run.py, which needs Python alone.
.PHONY: demo test check contracts

demo:
	python3 run.py demo

test:
	python3 run.py test

check:
	python3 run.py check

# transformers' own common tests of the installed release, downloaded from PyPI into build/.
contracts:
	.venv/bin/python tests/contracts/fetch.py build/contracts
	HF_HUB_OFFLINE=1 PYTHONPATH=$(CURDIR)/build/contracts .venv/bin/python -m pytest --import-mode=prepend tests/contracts
