"""What any frozen network needs, an autoencoder or a text encoder: weights in a dtype, compilation, chunks."""
