"""The processes that serve one address: they pass on to each other what is posted to one of them."""
