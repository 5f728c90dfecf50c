"""What every room may use: the machine, bounded caches, Ctrl-C, and torchvision beside a CPU torch."""
