"""The judge and the measurements. Never imported by the product; the demo loads the judge by file path, from a checkout only."""
