"""Where rows come from and how they become token sequences and tree rows."""
