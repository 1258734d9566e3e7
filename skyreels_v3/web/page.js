element.addEventListener('click', (event) => {
	const button = event.target.closest('button[data-do]');
	if (!button) return;
	if (button.dataset.do === 'play') {
		for (const video of element.querySelectorAll('video')) {
			video.currentTime = 0;
			video.play();
		}
		return;
	}
	button.disabled = true;
	setTimeout(() => { button.disabled = false; }, 1500);
	if (button.dataset.do === 'reload' || button.dataset.do === 'extend') {
		document.getElementById('forms').scrollIntoView({ behavior: 'smooth' });
	}
	if (button.dataset.do === 'compare') {
		setTimeout(() => document.getElementById('compare').scrollIntoView({ behavior: 'smooth', block: 'nearest' }), 1000);
	}
	trigger('click', { do: button.dataset.do, id: button.dataset.id });
});
