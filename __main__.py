"""``python -m visibench`` and the ``visibench`` console script."""

from .cli import main

if __name__ == "__main__":
    main()
