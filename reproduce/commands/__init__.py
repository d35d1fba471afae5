"""Groups of sub-commands of `g2rpo`, one file each."""
