"""One file each, to be run as they are; a package only so that the tests can share ``data``."""
