"""The only place that knows other frameworks; nothing imports it, so neither does `import jaxlstm` import them."""
