"""``python -m pipeline`` is ``cherry``."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
