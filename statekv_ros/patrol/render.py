"""Pictures of a patrol at any size: walls, floor, a door or an object, with the jitter and noise of a moving camera."""
import cv2
import numpy as np

from statekv_ros.patrol.world import SHAPES, Step, View

MODEL_SIZE = 64
FRAMES_PER_STEP = 2
_RGB = np.array([(205, 35, 35), (35, 165, 55), (45, 75, 215), (225, 205, 40), (150, 45, 175), (240, 240, 240)], np.float32)


def render(step: Step, random: np.random.Generator, width: int = MODEL_SIZE, height: int = MODEL_SIZE,
           squeeze: float = 1.0) -> np.ndarray:
    """The two camera frames of one step, uint8 [2, height, width, 3] RGB.

    squeeze: width of a thing over its height in pixels; below 1 as when a wide picture is resized to a square.
    """
    unit = height / MODEL_SIZE                  # everything below is in units of a 64-pixel picture
    wide = width / unit / squeeze
    wall = random.uniform(60, 135) + random.uniform(-12, 12, 3)
    floor = random.uniform(40, 120) + random.uniform(-12, 12, 3)
    horizon = int(random.uniform(30, 44) * unit)
    x, y, radius = wide * random.uniform(.24, .76), random.uniform(22, 46), random.uniform(8, 13)
    drift, seam = random.uniform(-2.5, 2.5), wide * random.uniform(-.3, 1.3)
    colour = np.clip(_RGB[step.colour] * random.uniform(.8, 1.08) + random.uniform(-14, 14, 3), 0, 255)
    grain, blur = random.uniform(0, 6), random.random() < .5
    shade = np.linspace(.8, 1.1, height - horizon, dtype=np.float32)[:, None, None]
    frames = np.empty((FRAMES_PER_STEP, height, width, 3), np.uint8)
    for index in range(FRAMES_PER_STEP):
        picture = np.empty((height, width, 3), np.float32)
        picture[:horizon], picture[horizon:] = wall, floor * shade
        at = int((seam + index * drift) * unit * squeeze)
        cv2.line(picture, (at, 0), (at, horizon), tuple((wall * .7).tolist()), max(1, int(3 * unit)))
        centre = (x + index * drift) * unit * squeeze, y * unit
        size = radius * unit * squeeze, radius * unit
        if step.view == View.OBJECT:
            _draw_object(picture, SHAPES[step.shape], centre, size, colour)
        elif step.view == View.DOOR:
            _draw_door(picture, centre[0], size[0], colour, unit)
        if blur:
            picture = cv2.GaussianBlur(picture, (0, 0), .6 * unit)
        picture *= random.uniform(.93, 1.07)
        picture += random.standard_normal((height, width, 1), dtype=np.float32) * grain
        picture += random.standard_normal((height, width, 3), dtype=np.float32) * (.6 * grain)
        frames[index] = np.clip(picture, 0, 255)
    return frames


def _draw_object(picture: np.ndarray, shape: str, centre: tuple[float, float], size: tuple[float, float],
                 colour: np.ndarray) -> None:
    x, y, across, tall = (int(round(value)) for value in (*centre, *size))
    light, dark = tuple(colour.tolist()), tuple((colour * .45).tolist())
    if shape == 'ball':
        cv2.ellipse(picture, (x, y), (across, tall), 0, 0, 360, light, -1, cv2.LINE_AA)
        cv2.ellipse(picture, (x - across // 3, y - tall // 3), (max(1, across // 4), max(1, tall // 4)), 0, 0, 360,
                    (245, 245, 245), -1)
    elif shape == 'box':
        cv2.rectangle(picture, (x - across, y - tall), (x + across, y + tall), light, -1)
        cv2.rectangle(picture, (x - across, y - tall), (x + across, y + tall), dark, max(1, tall // 10))
    elif shape == 'cone':
        corners = np.array([(x, y - tall), (x - across, y + tall), (x + across, y + tall)], np.int32)
        cv2.fillConvexPoly(picture, corners, light, cv2.LINE_AA)
    else:
        cv2.ellipse(picture, (x, y), (across, tall), 0, 0, 360, light, max(3, tall // 3), cv2.LINE_AA)


def _draw_door(picture: np.ndarray, centre: float, half: float, colour: np.ndarray, unit: float) -> None:
    x, across, floor = int(round(centre)), int(round(half)), picture.shape[0] - int(4 * unit)
    edge = max(1, int(2 * unit))
    cv2.rectangle(picture, (x - across - edge, int(2 * unit)), (x + across + edge, floor), tuple((colour * .45).tolist()), -1)
    cv2.rectangle(picture, (x - across, int(5 * unit)), (x + across, floor), tuple(colour.tolist()), -1)
    cv2.circle(picture, (x + across - 2 * edge, int(36 * unit)), edge, (20, 20, 20), -1)
