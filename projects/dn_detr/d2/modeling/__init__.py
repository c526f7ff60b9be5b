"""Meta-architectures, backbones, and what a configuration says of them."""
