-- Who a server fetches a version from: a server that holds it, else the store; each has so many slots.
-- KEYS[1] holders of the version (sorted set: URL, until when it is surely there, ms)
-- KEYS[2] prefix of the sources' slots (sorted sets: claimant, until when its slot is its own, ms); one hash tag, one node
-- ARGV[1] claimant   ARGV[2] lifetime of a claim, ms   ARGV[3] slots of a server   ARGV[4] slots of the store, 0 for none
-- ARGV[5] name of the store   ARGV[6] random integer   ARGV[7] number n of sources not to take
-- ARGV[8..7+n] these sources   ARGV[8+n..] holders that the claimant knows of besides
-- Returns {source} when a slot was taken, {'', 'wait'} when all are taken, {'', 'nobody'} when there is none to take.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local first = 8 + tonumber(ARGV[7])
local without = {[ARGV[1]] = true}
for i = 8, first - 1 do without[ARGV[i]] = true end

local holders, seen = {}, {}
local function add(url)
  if not without[url] and not seen[url] then
    seen[url] = true
    holders[#holders + 1] = url
  end
end
for _, url in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now, '+inf')) do add(url) end
for i = first, #ARGV do add(ARGV[i]) end

local function take(source, slots)
  local key = KEYS[2] .. source
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
  redis.call('ZREMRANGEBYSCORE', key, '(' .. (now + ARGV[2]), '+inf') -- made before the clock was set back
  if redis.call('ZSCORE', key, ARGV[1]) or redis.call('ZCARD', key) < slots then
    redis.call('ZADD', key, now + ARGV[2], ARGV[1])
    redis.call('PEXPIRE', key, ARGV[2])
    return true
  end
  return false
end

for i = 0, #holders - 1 do
  local source = holders[(ARGV[6] + i) % #holders + 1]
  if take(source, tonumber(ARGV[3])) then return {source} end
end
-- The store only while no server has it: so its uplink carries few copies, however many servers there are.
if #holders > 0 then return {'', 'wait'} end
if ARGV[4] == '0' then return {'', 'nobody'} end
if take(ARGV[5], tonumber(ARGV[4])) then return {ARGV[5]} end
return {'', 'wait'}
