"""stripe_pool: one global feature and n stripe features from a single read of the feature map."""
