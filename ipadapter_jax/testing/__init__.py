"""Tools for tests of this package and of code that uses it: small models of random weights. Needs no network and no
files."""
