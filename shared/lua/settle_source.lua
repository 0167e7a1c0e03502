-- Keep a slot of a source, or give it back; and say who holds the part of a version that came from it.
-- KEYS[1] slots of the source   KEYS[2..] holders of the part
-- ARGV[1] claimant   ARGV[2] lifetime of a claim, ms, 0 to give it back   ARGV[3] how long the claimant surely holds it, ms, 0 for not
-- ARGV[4] URL of a server that does not hold it after all; empty for none
-- Returns 1 when the slot was still the claimant's, 0 when not.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local score = redis.call('ZSCORE', KEYS[1], ARGV[1])
local ours = score and tonumber(score) > now
if ARGV[2] == '0' then
  redis.call('ZREM', KEYS[1], ARGV[1])
elseif ours then
  redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
for k = 2, #KEYS do
  if ARGV[4] ~= '' then redis.call('ZREM', KEYS[k], ARGV[4]) end
  if ARGV[3] ~= '0' then
    redis.call('ZADD', KEYS[k], now + ARGV[3], ARGV[1])
    redis.call('PEXPIRE', KEYS[k], ARGV[3])
  end
end
return ours and 1 or 0
