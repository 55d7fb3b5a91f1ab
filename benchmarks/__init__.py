"""Side-by-side measurements against peers: printed as ratios, never asserted. No part of the distribution."""
