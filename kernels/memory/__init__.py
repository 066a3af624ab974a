"""The memory operator: its types, its argument checks, its definition, and the public functions over them."""
