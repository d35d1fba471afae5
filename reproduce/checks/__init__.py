"""What ``g2rpo check`` looks at on one machine, one file for each kind of thing."""
