"""python train.py key=value ...: the same program as `clipft train`."""

import sys

from clipft.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
