# For those who have make; it only calls run.py, which needs Python alone.
.PHONY: demo test lint

demo:
	python3 run.py demo

test:
	python3 run.py test

lint:
	.venv/bin/ruff check .
