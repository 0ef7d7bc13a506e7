"""Small errors in the sources that compute. A test has to see each of them."""
