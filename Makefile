.PHONY: install test lint quick

install:
	pip install -c constraints.txt -e ".[dev]"

test:
	pytest -n auto --maxprocesses 4 --dist loadfile

lint:
	ruff check .
	ruff format --check .
	mypy .

quick:
	visibench sweep configs/quick.yaml
