"""The checks of ``g2rpo check`` on one machine, one file per topic."""
