"""The KV connector: FastServe's configuration and statistics channel inside vLLM."""
