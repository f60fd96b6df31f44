"""A server of embedders, rerankers, classifiers and question answering, for the clients of known APIs."""
