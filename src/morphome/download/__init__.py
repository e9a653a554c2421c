"""The GDC: what there is of a project, in which release, and how its files get here whole."""
