"""What the pages of a dataset are made of: figures, pictures, samples, words for them, and the templates."""
