"""What a whole-step measurement says: ratios, and a table."""
from rich.console import Console
from statekv_ros.terminal import narrow_table

EARLY = 64


def ratios(rows: list[dict]) -> dict:
    """Compare steps of one run.

    Returns:
        {policy: {early_frame, late_frame, late_over_early, full_over_this (at the late frame; None where full attention was
        left out there)}}. The late frame is the last measured one, the early one 64 or else the first.
    """
    step_ms = {(row['policy'], row['frame']): row['step_ms'] for row in rows}
    late_of_all = max(row['frame'] for row in rows)
    result = {}
    for policy in dict.fromkeys(row['policy'] for row in rows):
        frames = sorted(frame for name, frame in step_ms if name == policy)
        early, late = EARLY if EARLY in frames[:-1] else frames[0], frames[-1]
        full = step_ms.get(('full', late_of_all))
        result[policy] = {
            'early_frame': early, 'late_frame': late,
            'late_over_early': round(step_ms[policy, late] / step_ms[policy, early], 4),
            'full_over_this': None if full is None else round(full / step_ms[policy, late], 4)}
    return result


def print_table(result: dict) -> None:
    """A table of the rows, the ratios, and what was left out or cut."""
    cut = f' cut to {result["layers"]} layer(s),' if result['layers'] else ''
    columns = {'frame': 'frame', 'carried_tokens': 'carried', 'step_ms': 'ms', 'vision_ms': 'vision',
               'prefill_ms': 'text', 'select_ms': 'select', 'host_ms': 'host', 'floor_ms': 'floor', 'of_floor': 'of it'}
    table = narrow_table(f'frame step of {result["model"]},{cut} random weights, {result["dtype"]}, {result["step_tokens"]} tokens, '
                         f'{result["device"]}', 'policy', *columns.values())
    for row in result['rows']:
        cells = [row[name] for name in columns]
        table.add_row(row['policy'], *map(str, cells[:2]), *(f'{cell:.2f}' for cell in cells[2:-1]), f'{cells[-1]:.0%}')
    console = Console()
    console.print(table)
    for policy, ratio in result['ratios'].items():
        versus = '' if ratio['full_over_this'] is None or policy == 'full' else \
            f'; full attention takes {ratio["full_over_this"]:.2f} times as long'
        console.print(f'{policy}: frame {ratio["late_frame"]} takes {ratio["late_over_early"]:.3f} times frame '
                      f'{ratio["early_frame"]}{versus}')
    for left in result['left_out']:
        console.print(f'left out: {left["policy"]} at frame {left["frame"]}: {left["reason"]}')
    console.print('State and cache are filled with noise to their size at the frame. Milliseconds, medians of '
                  f'{result["rounds"]} measured in turn: vision tower, text model, selection; host: until all was queued; '
                  f'floor: at {result["matmul_tflops"]} TFLOP/s of matmul and {result["copy_gb_per_s"]} GB/s of copy, measured '
                  'in this run.')
