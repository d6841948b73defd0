"""Kill a training at random moments, start it again, and compare it with one that was left alone."""
