"""How each kernel class is computed: a file per class and kind of device."""
