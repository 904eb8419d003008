"""From observations to forecasts. Begin with `predictor`; the other modules, by what they are for:

- rows in: `rows`, `verdicts`, `known` (features), `single` (one row), `handles` (dense ticks)
- states: `pool`, `advance`, `late`, `exact`, `residence` and `keeping` (whole series), `snapshot`
- forecasts out: `forecasting`, `live` (what a predictor tells of itself)
- watching: `watch`, made of `pending`, `scores`, `conformal`, `signals`, `adapt`, `worth`; `tuning` (where it begins)
- beyond the process: `durable`, `resident` (evicted series), `ticks`, `state_records`, `stores`, `sharded`, `gather`
- trust: `certificate`, `parity`, `replay`
"""
