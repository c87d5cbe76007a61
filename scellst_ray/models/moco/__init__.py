"""MoCo v3: the method that pretrains the encoder."""
