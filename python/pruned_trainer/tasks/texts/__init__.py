"""Tasks whose data are rows of texts: classes and scores of texts and of pairs, labels of words, rankings,
embeddings."""
