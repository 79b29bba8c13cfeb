// Returns each text whose contrast with what lies below it is under 4.5 to 1, for WCAG AA.
() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    const over = (colours) => {
        canvas.fillStyle = "#fff";
        canvas.fillRect(0, 0, 1, 1);
        for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const luminance = (rgb) => {
        const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const dialog = document.querySelector("dialog[open]");
    const low = [];
    for (const element of (dialog ?? document.body).querySelectorAll("*")) {
        const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        const box = element.getBoundingClientRect();
        const isField = element.matches("input, textarea, select");
        if ((!own && !isField) || !box.width || !element.checkVisibility() || element.disabled || element.closest(".unseen"))
            continue;
        const below = [];
        for (let at = element; at; at = at.parentElement) below.unshift(getComputedStyle(at).backgroundColor);
        const colours = [getComputedStyle(element).color];
        if (element.placeholder) colours.push(getComputedStyle(element, "::placeholder").color);
        for (const colour of colours) {
            const [a, b] = [luminance(over([...below, colour])), luminance(over(below))].sort((x, y) => y - x);
            const ratio = (a + 0.05) / (b + 0.05);
            const text = element.textContent.slice(0, 30);
            if (ratio < 4.5) low.push(`${element.tagName} ${element.className} "${text}" ${ratio.toFixed(2)}`);
        }
    }
    return low;
}
