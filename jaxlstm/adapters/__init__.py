"""The only code that knows other frameworks. Nothing imports it, so `import jaxlstm` imports no framework."""
