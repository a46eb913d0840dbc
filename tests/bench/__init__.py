"""The judge and the measurements. Never imported by the product; the demo loads the judge from a checkout only."""
