"""The networks: our transformer, and thin wrappers around the libraries' VAE and encoders."""
