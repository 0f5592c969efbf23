"""From a policy to its accuracy: the smaller network is run on the search split, untrained."""
