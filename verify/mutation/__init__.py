"""Small errors in the sources that compute, each of which a test has to see."""
