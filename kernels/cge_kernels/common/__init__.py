"""What the operators share: dispatch, launches, tile sizes, argument checks, the scratch budget, sharding."""
