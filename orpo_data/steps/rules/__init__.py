"""The rules of Clean: structure.py judges a pair's shape and labels, content.py what its texts say."""
