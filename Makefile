.PHONY: install test lint quick

install:
	pip install -c constraints.txt -e ".[dev]"

test:
	pytest

lint:
	ruff check .
	ruff format --check .
	mypy .

quick:
	visibench sweep configs/quick.yaml
