"""A small VAE, trained on the photographs inside scikit-image, for offline examples, tests and previews."""
