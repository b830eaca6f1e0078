"""A web page to talk to a model: what it answers (``host``), what it is (``card``), and the page itself (``page``)."""
