.PHONY: install test lint quick bench-sweep bench-none bench-batches bench-harness bench-launches bench-memory bench-tables bench-whole-maps

install:
	pip install -c constraints.txt -e ".[dev]"

test:
	pytest -n auto --maxprocesses 4 --dist loadfile

lint:
	ruff check .
	ruff format --check .
	mypy .
	lint-imports

quick:
	visibench sweep configs/quick.yaml

bench-sweep:
	python benchmarks/sweep.py

bench-none:
	python benchmarks/generate.py

bench-batches:
	python benchmarks/batches.py

bench-harness:
	python benchmarks/harness.py

bench-launches:
	python benchmarks/launches.py

bench-memory:
	python benchmarks/memory.py --set feature_cache_gb=0
	python benchmarks/memory.py --set feature_cache_gb=0.002

bench-tables:
	python benchmarks/tables.py

bench-whole-maps:
	python benchmarks/whole_maps.py
