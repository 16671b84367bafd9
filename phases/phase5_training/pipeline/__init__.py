"""The parts a training run is made of; each file stands alone."""
