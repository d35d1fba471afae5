"""Flow-matching mathematics: sigma grids, transitions, granularities, the sweep over the grid."""
