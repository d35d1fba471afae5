"""The compared methods, one file each; a method's name is the name of its file."""
