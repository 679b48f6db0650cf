# For those who have make; it only calls run.py, which needs Python alone.
.PHONY: demo test check

demo:
	python3 run.py demo

test:
	python3 run.py test

check:
	python3 run.py check
