"""Where `hf-geglu demo` gets real weights and real text from, and what it shows. Nothing here is needed elsewhere."""
